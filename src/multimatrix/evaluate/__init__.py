"""Is a model right, and how good is it?"""
