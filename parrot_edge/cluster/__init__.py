"""The same runs on a Ray cluster: engines that are elsewhere, work that is spread."""
