"""What runs inside the server, and what starts it: numpy and Pillow, never torch."""
