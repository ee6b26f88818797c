"""The one place that touches a torch model: capture layers from it, write weights back into it."""
