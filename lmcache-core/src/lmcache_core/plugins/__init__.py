"""What is installed: found, checked, and made into objects."""
