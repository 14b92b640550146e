"""Images as the policies were trained on them, without the libraries that they were trained with."""
