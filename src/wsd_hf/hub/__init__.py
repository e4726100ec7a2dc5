"""Models of the Hub and of folders: fetched, checked and read; pilots published there with a card."""
