"""Pages of HTML that commands write: one look, and no file or script from elsewhere."""
