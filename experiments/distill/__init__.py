"""DASH (arXiv 2606.00798): small students of guided teachers, by every objective."""
