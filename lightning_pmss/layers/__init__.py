"""Linear layers: what a frozen one is and holds, and what every adapted one can do, whatever its method."""
