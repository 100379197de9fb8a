"""What a data set and its split are worth: copies, shortcuts, leaks, and what follows from them."""
