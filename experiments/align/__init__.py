"""RSM (arXiv 2604.17415): estimators and recipes against an exact optimum, then on a small Flux pipeline."""
