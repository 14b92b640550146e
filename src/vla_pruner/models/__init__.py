"""Networks that this project had to write because no library ships them."""
