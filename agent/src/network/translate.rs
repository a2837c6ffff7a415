//! Translation of an address: what containers send to a port of one address arrives at another port of it. It is a table of
//! nftables with an owner, the socket that made it: containers may flush their rules and it stays, and it goes with the socket.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use super::netlink::{APPEND, CREATE, Message, NLM_F_ACK, NetlinkError, Socket};

/// Subsystem of nftables, which is the high byte of its message types.
const NFTABLES: u16 = (libc::NFNL_SUBSYS_NFTABLES << 8) as u16;

/// A flag of attributes that are made of others.
const NESTED: u16 = libc::NLA_F_NESTED as u16;

// include/uapi/linux/netfilter/nf_tables.h and nf_nat.h: what the libc crate has not.
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_OWNER: u32 = 2;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NF_INET_LOCAL_OUT: u32 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_L4PROTO: u32 = 16;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_NAT_TYPE: u16 = 1;
const NFTA_NAT_FAMILY: u16 = 2;
const NFTA_NAT_REG_ADDR_MIN: u16 = 3;
const NFTA_NAT_REG_PROTO_MIN: u16 = 5;
const NFT_NAT_DNAT: u32 = 1;
const NFT_REG_1: u32 = 1;
const NFT_REG_2: u32 = 2;

/// As that of any translation of destinations (`NF_IP_PRI_NAT_DST`).
const PRIORITY: i32 = -100;

/// Name of the table and of its chain.
const NAME: &str = "podhull";

/// Has what is sent to `port` of an address arrive at its port `to`, over UDP and TCP, in the network namespace of this thread, for
/// as long as what is returned is open.
pub fn redirect(address: Ipv4Addr, port: u16, to: u16) -> Result<OwnedFd, NetlinkError> {
    let socket = Socket::of_netfilter()?;
    let mut all = vec![(libc::NFNL_MSG_BATCH_BEGIN as u16, 0, Message::new(batch()))];
    let table = Message::new(header()).with(NFTA_TABLE_NAME, text(NAME)).with(NFTA_TABLE_FLAGS, big(NFT_TABLE_F_OWNER));
    all.push((NFTABLES | libc::NFT_MSG_NEWTABLE as u16, CREATE | NLM_F_ACK, table));
    let hook = Message::default()
        .with(NFTA_HOOK_HOOKNUM, big(NF_INET_LOCAL_OUT))
        .with(NFTA_HOOK_PRIORITY, PRIORITY.to_be_bytes());
    let chain = Message::new(header())
        .with(NFTA_CHAIN_TABLE, text(NAME))
        .with(NFTA_CHAIN_NAME, text(NAME))
        .with(NFTA_CHAIN_HOOK | NESTED, hook.nested())
        .with(NFTA_CHAIN_TYPE, text("nat"));
    all.push((NFTABLES | libc::NFT_MSG_NEWCHAIN as u16, CREATE | NLM_F_ACK, chain));
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        let rule = Message::new(header())
            .with(NFTA_RULE_TABLE, text(NAME))
            .with(NFTA_RULE_CHAIN, text(NAME))
            .with(NFTA_RULE_EXPRESSIONS | NESTED, expressions(address, protocol as u8, port, to).nested());
        all.push((NFTABLES | libc::NFT_MSG_NEWRULE as u16, APPEND | NLM_F_ACK, rule));
    }
    all.push((libc::NFNL_MSG_BATCH_END as u16, 0, Message::new(batch())));
    socket.batch(&all)?;
    Ok(socket.into())
}

/// What a packet is compared with, and what becomes of it.
fn expressions(address: Ipv4Addr, protocol: u8, port: u16, to: u16) -> Message {
    let load = |base, offset: u32, length: u32| {
        Message::default()
            .with(NFTA_PAYLOAD_DREG, big(NFT_REG_1))
            .with(NFTA_PAYLOAD_BASE, big(base))
            .with(NFTA_PAYLOAD_OFFSET, big(offset))
            .with(NFTA_PAYLOAD_LEN, big(length))
    };
    let equals = |value: &[u8]| {
        Message::default()
            .with(NFTA_CMP_SREG, big(NFT_REG_1))
            .with(NFTA_CMP_OP, big(NFT_CMP_EQ))
            .with(NFTA_CMP_DATA | NESTED, Message::default().with(NFTA_DATA_VALUE, value).nested())
    };
    let immediate = |register, value: &[u8]| {
        Message::default()
            .with(NFTA_IMMEDIATE_DREG, big(register))
            .with(NFTA_IMMEDIATE_DATA | NESTED, Message::default().with(NFTA_DATA_VALUE, value).nested())
    };
    let meta = Message::default().with(NFTA_META_DREG, big(NFT_REG_1)).with(NFTA_META_KEY, big(NFT_META_L4PROTO));
    let nat = Message::default()
        .with(NFTA_NAT_TYPE, big(NFT_NAT_DNAT))
        .with(NFTA_NAT_FAMILY, big(libc::NFPROTO_IPV4 as u32))
        .with(NFTA_NAT_REG_ADDR_MIN, big(NFT_REG_1))
        .with(NFTA_NAT_REG_PROTO_MIN, big(NFT_REG_2));
    [
        // The destination, at its place in the header of IPv4, and the port in that of UDP and TCP.
        ("payload", load(NFT_PAYLOAD_NETWORK_HEADER, 16, 4)),
        ("cmp", equals(&address.octets())),
        ("meta", meta),
        ("cmp", equals(&[protocol])),
        ("payload", load(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2)),
        ("cmp", equals(&port.to_be_bytes())),
        ("immediate", immediate(NFT_REG_1, &address.octets())),
        ("immediate", immediate(NFT_REG_2, &to.to_be_bytes())),
        ("nat", nat),
    ]
    .into_iter()
    .fold(Message::default(), |list, (name, data)| {
        let expression =
            Message::default().with(NFTA_EXPR_NAME, text(name)).with(NFTA_EXPR_DATA | NESTED, data.nested());
        list.with(NFTA_LIST_ELEM | NESTED, expression.nested())
    })
}

/// nftables has its numbers in network order.
fn big(number: u32) -> [u8; 4] {
    number.to_be_bytes()
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// `struct nfgenmsg`: of IPv4.
fn header() -> Vec<u8> {
    vec![libc::NFPROTO_IPV4 as u8, 0, 0, 0]
}

/// `struct nfgenmsg` around the messages that are to become true at once.
fn batch() -> Vec<u8> {
    let [high, low] = (libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes();
    vec![libc::AF_UNSPEC as u8, 0, high, low]
}
