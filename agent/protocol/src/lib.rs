//! podhull-protocol
