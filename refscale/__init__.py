"""Score preference pairs with the reference model, keep the clear ones, train on those."""

__version__ = "0.1.0"
