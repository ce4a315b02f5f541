"""How good Ask and Chat are."""
