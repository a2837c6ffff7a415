//! Joining two interfaces of a network namespace: each frame that arrives at one leaves through the other, before the
//! namespace's own stack sees it.
//!
//! It is a table of nftables with one chain at the ingress of each, and the table has an owner: the netlink socket that made
//! it. When the last copy of that socket is closed the kernel removes the table. Whoever holds it, the machine's process, may
//! be killed at any moment, and nothing stays on an interface that belongs to somebody else.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::netlink::{Messages, Netlink};

/// Subsystem of nftables, which is the high byte of its message types.
const NFTABLES: u16 = (libc::NFNL_SUBSYS_NFTABLES << 8) as u16;

// include/uapi/linux/netfilter/nf_tables.h: what the libc crate has not.
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_OWNER: u32 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEV: u16 = 3;
const NF_NETDEV_INGRESS: u32 = 0;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_FWD_SREG_DEV: u16 = 1;
const NFT_REG_1: u32 = 1;

/// Behind all chains of others: what they drop or change they drop or change here too.
const PRIORITY: i32 = i32::MAX;

/// One of the two interfaces.
#[derive(Clone, Copy)]
pub struct End<'a> {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: &'a str,
}

/// Joins an interface to another, in the namespace of this thread, for as long as what is returned is open.
/// [`io::ErrorKind::AlreadyExists`] if it is joined to one already.
pub fn join(interface: End<'_>, other: End<'_>) -> io::Result<OwnedFd> {
    let netlink = open()?;
    let table = table(interface.index);
    let mut messages = Messages::new();
    messages.message(libc::NFNL_MSG_BATCH_BEGIN as u16, libc::NLM_F_REQUEST as u16, &batch());
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    messages
        .request(NFTABLES | libc::NFT_MSG_NEWTABLE as u16, create, &header())
        .text(NFTA_TABLE_NAME, &table)
        .put(NFTA_TABLE_FLAGS, &NFT_TABLE_F_OWNER.to_be_bytes());
    for (chain, from, to) in [("in", interface, other), ("out", other, interface)] {
        let mut attributes = messages.request(NFTABLES | libc::NFT_MSG_NEWCHAIN as u16, create, &header());
        attributes.text(NFTA_CHAIN_TABLE, &table).text(NFTA_CHAIN_NAME, chain).text(NFTA_CHAIN_TYPE, "filter");
        attributes
            .nest(NFTA_CHAIN_HOOK)
            .put(NFTA_HOOK_HOOKNUM, &NF_NETDEV_INGRESS.to_be_bytes())
            .put(NFTA_HOOK_PRIORITY, &PRIORITY.to_be_bytes())
            .text(NFTA_HOOK_DEV, from.name);
        drop(attributes);
        let append = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
        let mut attributes = messages.request(NFTABLES | libc::NFT_MSG_NEWRULE as u16, append, &header());
        attributes.text(NFTA_RULE_TABLE, &table).text(NFTA_RULE_CHAIN, chain);
        let mut expressions = attributes.nest(NFTA_RULE_EXPRESSIONS);
        let mut expression = expressions.nest(NFTA_LIST_ELEM);
        expression.text(NFTA_EXPR_NAME, "immediate");
        let mut data = expression.nest(NFTA_EXPR_DATA);
        data.put(NFTA_IMMEDIATE_DREG, &NFT_REG_1.to_be_bytes());
        // A register holds the number as the processor does.
        data.nest(NFTA_IMMEDIATE_DATA).put(NFTA_DATA_VALUE, &to.index.to_ne_bytes());
        drop(data);
        drop(expression);
        let mut expression = expressions.nest(NFTA_LIST_ELEM);
        expression.text(NFTA_EXPR_NAME, "fwd");
        expression.nest(NFTA_EXPR_DATA).put(NFTA_FWD_SREG_DEV, &NFT_REG_1.to_be_bytes());
    }
    messages.message(libc::NFNL_MSG_BATCH_END as u16, libc::NLM_F_REQUEST as u16, &batch());
    match netlink.request(&messages) {
        Ok(()) => Ok(netlink.into()),
        // A table that has another owner may not even be named.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && exists(&netlink, &table)? => {
            Err(Errno::EXIST.into())
        }
        Err(error) => Err(error),
    }
}

/// Whether an interface of the namespace of this thread is joined to another.
pub fn is_joined(index: u32) -> io::Result<bool> {
    exists(&open()?, &table(index))
}

fn open() -> io::Result<Netlink> {
    Netlink::open(Some(rustix::net::netlink::NETFILTER))
}

fn exists(netlink: &Netlink, table: &str) -> io::Result<bool> {
    let mut messages = Messages::new();
    messages.request(NFTABLES | libc::NFT_MSG_GETTABLE as u16, 0, &header()).text(NFTA_TABLE_NAME, table);
    match netlink.request(&messages) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// By the number: another interface may get the name of one that is gone.
fn table(index: u32) -> String {
    format!("podhull-{index}")
}

/// `struct nfgenmsg`: of what concerns devices.
fn header() -> [u8; 4] {
    [libc::NFPROTO_NETDEV as u8, 0, 0, 0]
}

/// `struct nfgenmsg` around the messages that are to become true at once.
fn batch() -> [u8; 4] {
    let [high, low] = (libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes();
    [libc::AF_UNSPEC as u8, 0, high, low]
}
