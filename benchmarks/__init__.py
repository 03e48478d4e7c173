"""What fieldsmith costs beside the networks that it asks: `make bench` runs all of it and writes results/bench."""
