"""timm's vision transformers, tapped; masked autoencoders; checkpoint formats.

Importing it makes timm know `tinymim_fast_vit`, the model of exports with a number of heads for each block, and
`tinymim_fast_star`, the classifier of TinyMIM*-T.
"""

from tinymim_fast.models.star import tinymim_fast_star
from tinymim_fast.models.vit import tinymim_fast_vit

__all__ = ["tinymim_fast_star", "tinymim_fast_vit"]
