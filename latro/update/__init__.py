"""One update's gradient, and what happens when it is not finite or does not fit."""
