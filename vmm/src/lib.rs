//! podhull-vmm
