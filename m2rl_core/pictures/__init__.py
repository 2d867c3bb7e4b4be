"""How a chart looks and what is saved of it: one style, Altair for the page, a PNG beside it."""
