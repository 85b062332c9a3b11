"""What is installed here, which devices there are, and what works, by trying it. The parent process imports no torch."""
