"""What is read and how outputs are named: the only rooms that know BIDS."""
