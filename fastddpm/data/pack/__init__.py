"""The pack: a file of encoded images that are decoded while training."""
