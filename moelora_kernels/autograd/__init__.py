"""The torch.autograd.Functions of the layers."""
