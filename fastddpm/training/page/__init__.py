"""index.html of a run: what was trained on what, how it went, and what it draws, on one page without a network."""

from .write import try_write_page, write_page

__all__ = ["try_write_page", "write_page"]
