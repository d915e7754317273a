"""From a scan as it comes to the SRI24 grid: the nipype workflow and its interfaces."""
