"""The parts of `examples/train.py`. Augmentation, losses, optimisers, schedules and the average of
the weights are timm's; what is here puts them together."""
