"""What an adapter is: PEFT's config and tensors, where it comes from, and whether it fits a base."""
