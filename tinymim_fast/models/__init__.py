"""Vision transformers: timm's, tapped at a block's qkv projection; masked autoencoders; checkpoint formats."""
