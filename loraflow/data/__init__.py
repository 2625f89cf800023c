"""The dataset side: pin, formats, checks, split, template and mask, packing."""
