"""The model that `wrap` makes: the backbone, its adapters and the dial; saving and loading."""
