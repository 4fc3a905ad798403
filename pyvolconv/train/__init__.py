"""The comparison that the package was made for: a 3-D CNN and an LSTM, trained in one loop on the same volumes."""
