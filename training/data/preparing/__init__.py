"""From records to tokens on the disk."""
