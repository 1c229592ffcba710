"""The methods that OmniMem is compared with, one file each."""
