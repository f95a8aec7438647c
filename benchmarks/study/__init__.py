"""The study: does CKTAT help, which part of it, and with what recipe?"""
