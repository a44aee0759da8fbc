import pytest


def test_world_of_one(world):
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert world.broadcast(lambda: 3) == 3 and world.gather("x") == ["x"]
    with pytest.raises(KeyError, match="gone"):
        world.broadcast(lambda: {}["gone"])
    work, answer = world.start_max(2)
    work.wait()
    assert int(answer) == 2
