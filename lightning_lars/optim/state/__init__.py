"""What an optimizer keeps between two steps, in the step and in a checkpoint."""
