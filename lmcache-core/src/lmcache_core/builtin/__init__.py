"""The plugins that come with core, registered through the same hooks as everybody's."""
