"""MT-EditFlow (arXiv 2606.01985): does training on own sessions cure exposure bias?"""
