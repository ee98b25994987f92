"""Evaluation of models on tasks: questions, engines that answer, graders, estimates, and their presentation.

Modules import torch, transformers and lm-eval only where they use them, so that help stays fast.
"""
