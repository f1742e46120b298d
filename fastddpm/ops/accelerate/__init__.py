"""Our operations in other libraries' networks, in place: `report = fastddpm.accelerate(unet)`."""

from .networks import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
