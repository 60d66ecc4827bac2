-- For proofs: what is really there, in the plainest possible way.

-- name: conversation_rows
-- $1 tenant, $2 conversation
select item_id, position from buffer.items
where tenant = $1 and conversation = $2 and data is not null
order by position

-- name: forget_item
-- Plants a loss, so that a proof can show that it would notice one. $1 tenant, $2 conversation, $3 item id
delete from buffer.items where tenant = $1 and conversation = $2 and item_id = $3
