"""The pack: encoded images in one file, decoded while training."""
