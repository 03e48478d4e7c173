"""VSM (arXiv 2606.00377): does a smooth score hallucinate, and what helps?"""
