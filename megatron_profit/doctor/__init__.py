"""`megatron-profit doctor`: are machine, model and data fit for a training, and is the loss right?"""
