"""timm's vision transformers, tapped; masked autoencoders; checkpoint formats.

Importing it makes timm know `tinymim_fast_vit`, the model of exports with a number of heads for each block.
"""

from tinymim_fast.models.vit import tinymim_fast_vit

__all__ = ["tinymim_fast_vit"]
