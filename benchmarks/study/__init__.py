"""Does CKTAT help, which part of it, and with what recipe? A grid of runs, and the page that is made of them."""
