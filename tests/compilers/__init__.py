"""Programs made of models that use this package, and the tools that watch them."""
