"""What conversions lose and cost: measurements."""
