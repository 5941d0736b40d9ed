"""Power laws fitted to loss and error over compute."""
