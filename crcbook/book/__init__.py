"""What only the chapters need: figures, explorers, widgets."""
