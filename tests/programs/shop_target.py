"""A shop that refuses some customers."""


class Shop:
    def sell(self, item, price):
        if price < 0:
            raise ValueError("a price below zero")
        return price

    def day(self):
        for price in (3, 4.5, -1):
            try:
                self.sell("tea", price)
            except ValueError:
                pass
