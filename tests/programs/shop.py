"""A day in the shop."""
from shop_target import Shop

Shop().day()
